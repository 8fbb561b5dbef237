"""One trainer for both engines: schedules, checkpoints, the log and its plot. Imports no torch."""
