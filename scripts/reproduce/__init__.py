"""The plan of docs/results.md, and the code that writes the page from its audits."""
