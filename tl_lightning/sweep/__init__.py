"""Compare many heads on stored features, and choose one honestly."""
