"""What our own training loops and the TRL trainers share: the optimizer with fp32 master weights, schedules,
sessions."""
