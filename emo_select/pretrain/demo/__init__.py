"""Training of the shipped demo models: synthetic documents, one process, a plain loop."""
