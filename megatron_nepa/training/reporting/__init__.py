"""What a run tells: console, metrics, health, figures, the run's folder."""
