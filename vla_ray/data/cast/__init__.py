"""CAST (catglossop/CAST-dataset): published shards and plain tables in, samples out. No TensorFlow."""
