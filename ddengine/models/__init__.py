"""The networks: loading them, walking them, and the readout head."""
