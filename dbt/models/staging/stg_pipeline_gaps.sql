-- Written from contracts/pipeline-gaps.yaml by dbt/generate.py: do not edit.
SELECT gap_id, state, consumer_kind, consumer, topic, topic_id, source_epoch, source_partition, start_offset,
end_offset, records_removed, detail, detected_by, ts_detected FROM {{ source('lake', 'pipeline_gaps') }}
