"""The LightningModule around an image classifier, its data and its checkpoints."""
