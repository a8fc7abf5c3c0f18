#!/usr/bin/env bash
# One step of a workflow: step.sh FOLDER NAME DIGEST RESULT COMMAND..., with its log and its marks in FOLDER/steps.
# A command that was interrupted resumes in RESULT, which it alone fills. What another digest has left there is moved to
# FOLDER/earlier, never deleted: no training resumes with other settings. RESULT is empty for a command without one.
set -euo pipefail
folder=$1 name=$2 digest=$3 result=$4
shift 4
steps=$folder/steps/$name
mkdir -p "$(dirname "$steps")"
if [ -e "$result" ] && [ "$(cat "$steps.begun" 2>/dev/null)" != "$digest" ]; then
	mkdir -p "$folder/earlier/$name"
	mv "$result" "$folder/earlier/$name/$(date +%Y%m%d-%H%M%S)"
fi
echo "$digest" >"$steps.begun"
"$@" >>"$steps.log" 2>&1 || {
	code=$?
	tail -n 5 "$steps.log" >&2
	exit $code
}
echo $SECONDS >"$steps.$digest"
