"""Shards in a bucket or on a web server: named by URL, read by byte range through fsspec."""
