"""Data: files to rows, rows to clients, rows to batches.

``sources`` reads rows, ``partition`` deals them to clients, ``tasks`` encodes them (the only place
that knows a tokenizer or pixels), ``shards`` checks what every client got before anything starts.
"""
