"""The doors into other packages: all that touches their private names is here."""
