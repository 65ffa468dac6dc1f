"""One HTML file that shows what a run, or several, did and how good its detections are."""
