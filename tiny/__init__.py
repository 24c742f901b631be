"""Two small trained models, two small benchmarks, and make.py, which makes them."""
