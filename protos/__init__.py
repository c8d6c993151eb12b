"""Wire formats: V2 inference, management, the etcd v3 subset, Triton's config text. Regenerate with `make protos`."""
