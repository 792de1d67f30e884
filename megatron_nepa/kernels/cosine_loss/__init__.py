"""The negative cosine of predictions and targets."""
