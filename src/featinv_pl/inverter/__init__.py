"""p(image | feature map): the trained model, its folder and its pipeline."""
