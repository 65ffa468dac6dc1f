"""Analysis of datasets, models, detections and run folders."""
