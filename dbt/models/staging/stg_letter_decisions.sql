-- Written from contracts/letter-decisions.yaml by dbt/generate.py: do not edit.
SELECT letter_id, decision, topic, topic_id, record_partition, record_offset, record_index, processor, reason,
why, who, redrive_commit_id, ts_decided_ns, ts_decided FROM {{ source('lake', 'letter_decisions') }}
