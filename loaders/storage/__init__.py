"""Models in object stores: found, fetched into a cache on disk, and held there while they are in use.

`source` says what a model's path means, `store` and `local` speak with stores, `fetch` and `archive` make files of
objects, `cache` keeps them.
"""
