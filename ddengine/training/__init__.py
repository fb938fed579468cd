"""How the embedded model and readout heads are made; needed only to train, never to edit."""
