"""featinv-pl: natural images from a classifier's spatial feature map."""
