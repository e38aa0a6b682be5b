"""Transfer learning for image classification on Lightning."""
