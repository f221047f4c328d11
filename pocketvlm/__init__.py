"""The roof: command line, pipeline and doctor; the only room that knows every stage."""

__version__ = "0.1.0"
