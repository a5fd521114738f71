"""Generate, measure, count, bound, report. The auditor shares no code path with the trainer."""
