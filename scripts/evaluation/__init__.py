"""What the verifiers' command and the benchmarks share: pictures of a model, tables, sheets, records."""
