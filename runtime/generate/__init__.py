"""From a loaded model to text: sessions, sampling, batches, conversations, snapshots."""
