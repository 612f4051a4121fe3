"""Extras for plain torch, whose sharding (``placement.dtensor``) is part of the package itself."""
