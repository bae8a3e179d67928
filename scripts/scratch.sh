# Sourced by what runs tests: where they put the servers that they throw away by the hundred.
#
# In memory where there is room: on a disk, making and deleting a thousand files for each server is half of all work. What a
# killed process leaves behind is the same in both. Tests that write gigabytes or kill whole servers ask for a disk themselves
# (`Builder::on_disk`), and who sets TMPDIR decides for the others.
scratch_room() {
    local shm memory
    shm=$(df --output=avail -k /dev/shm 2>/dev/null | tail -n 1)
    memory=$(sed -n 's/^MemAvailable: *\([0-9]*\) kB/\1/p' /proc/meminfo 2>/dev/null)
    [ "${shm:-0}" -ge $((8 << 20)) ] && [ "${memory:-0}" -ge $((12 << 20)) ] && [ -w /dev/shm ]
}
if [ -z "${TMPDIR:-}" ] && scratch_room; then
    export TMPDIR=/dev/shm
fi
