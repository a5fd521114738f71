"""The plan of docs/results.md, and the page made of its audits."""
