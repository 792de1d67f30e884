"""Tasks: how a model, its data and its metrics are built for the shared loop."""
