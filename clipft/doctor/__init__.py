"""Is this machine ready for a run? One small check per question, each with what to do."""
