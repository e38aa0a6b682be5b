"""Cut a network into stages by tracing it."""
