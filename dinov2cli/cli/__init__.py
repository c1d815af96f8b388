"""Command line: words become requests, and results are printed; heavy imports happen where a request is run."""
