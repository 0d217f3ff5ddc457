"""Files or hub names -> features, batches, labels and metrics of a task. `data.tasks`, the table, imports quickly."""
