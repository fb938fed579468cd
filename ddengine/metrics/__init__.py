"""How good edits are: the published metrics, each as it was defined, and the readers of the published sets."""
