"""HTTP/2 (RFC 9113), HPACK (RFC 7541) and gRPC over HTTP/2, without I/O: bytes in, bytes and calls out.

`frames` is the wire, `streams` the one table of stream states, `outbound` and `connection` the two directions of a
connection, `server` and `client` the two roles, `grpc` what headers mean to gRPC. Sockets and clocks belong to
`mesh.h2_server` and `mesh.h2_client`.
"""
