"""The version of the distribution ``threaded-zeo``."""

__version__ = '1.0.dev0'
