"""WHEN and WITH WHAT: Dagster definitions, resources, schedules. `workspace.yaml` names the code locations."""
