"""Several processes, one training run: collectives, rank-zero work, rendezvous."""
