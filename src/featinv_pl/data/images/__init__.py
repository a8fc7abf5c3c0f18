"""Images: folders, labels, crops, corruptions."""
