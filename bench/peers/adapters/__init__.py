"""One file a peer; what an adapter is made of stands in bench/peers/__init__.py."""
