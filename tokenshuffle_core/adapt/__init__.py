"""What changes a trained model."""
