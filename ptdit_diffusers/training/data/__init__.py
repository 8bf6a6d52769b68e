"""The data layer of every training: finding and reading media, buckets, encoding, shards, order."""
