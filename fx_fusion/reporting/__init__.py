"""Reports for people: pages, drawings, the change by hand."""
