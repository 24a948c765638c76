"""What answers: model files, runtimes, replicas, the edge and offline pipelines."""
