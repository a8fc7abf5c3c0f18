"""Feature shards: samples, reader, writer, manifest."""
