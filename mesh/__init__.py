"""The shell around placement and loaders: servers, registry, peers. The only package that awaits."""

__version__ = "0.1.0"
