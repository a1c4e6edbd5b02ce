"""Checkpoints in an object store, which several servers share.

records/OWNER/ID.json    records: immutable, written last, so that the blobs that they name exist
used/OWNER/ID            empty: its time is that of the checkpoint's last use
blobs/DIGEST             files: each content once, for all owners
claims/DIGEST/ID         says that a server is about to write a record that names the blob
removing/DIGEST/RANDOM   says that a server is about to remove the blob, unless it is claimed

A server has the files of checkpoints that it uses in a local store as well, which is a cache. No
server has an index that another one could make wrong: a checkpoint exists while its record does.

The store must show objects at once to all that read or list them, as S3, Google's and Azure's do.
No object is written by two servers, so no write needs a condition.
"""
