-- Written from contracts/commits.yaml by dbt/generate.py: do not edit.
SELECT table_name, snapshot_id, commit_id, operation, ts_committed, added_rows, source_ranges, summary FROM {{
source('lake', 'commits') }}
