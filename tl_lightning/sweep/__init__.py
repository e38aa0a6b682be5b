"""Compare many heads on cached features, and choose one by a score without the optimism of the selection."""
