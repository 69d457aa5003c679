/* What the journal of an earlier run says, taken up when that run was this one. */
#include "base/doc.h"
#include "base/file.h"
#include "quantize/census.h"
#include "quantize/identity.h"
#include "quantize/record.h"
#include "quantize/run.h"
#include <inttypes.h>
#include <stdlib.h>
#include <string.h>

static bool read_data(struct run *r, const struct journal_record *record, uint64_t *offset, struct err *e)
{
    struct writer_record head;
    struct writer_result x;
    const char *data = record->data;
    if (record->bytes < sizeof head) return err_set(e, ERR_FORMAT, "record of %u bytes", record->bytes);
    memcpy(&head, data, sizeof head);
    if (head.offset < *offset || (record->bytes - sizeof head) / sizeof x != head.n)
        return err_set(e, ERR_FORMAT, "offset %" PRIu64 " after %" PRIu64, head.offset, *offset);
    for (uint64_t i = 0; i < head.n; i++) {
        memcpy(&x, data + sizeof head + i * sizeof x, sizeof x);
        if (x.index >= r->plan.n_matrices) return err_set(e, ERR_FORMAT, "matrix %" PRIu64, x.index);
        r->results[x.index] = x.result;
    }
    *offset = head.offset;
    return true;
}

static bool read_records(struct run *r, size_t at, uint64_t *offset, struct err *e)
{
    struct journal_record record;
    *offset = 0;
    while (journal_next(&r->journal, &at, &record)) {
        bool ok = record.kind == JOURNAL_LAYER  ? run_layer_read(r, &record, e)
                  : record.kind == JOURNAL_DATA ? read_data(r, &record, offset, e)
                                                : err_set(e, ERR_FORMAT, "record of kind %u", record.kind);
        if (!ok) return err_note(e, "%s", r->journal.path);
    }
    return true;
}

/* What has been done is taken over; the files are cut to it. */
static bool take_up(struct run *r, size_t at, struct err *e)
{
    uint64_t offset;
    if (!read_records(r, at, &offset, e)) return false;
    if (r->destination.is_renamed) return true;
    report_warn(r->options.report, "%s: continuing an interrupted run", r->destination.work);
    /* What layers were packed and not journaled lies behind the spool's end. */
    return (!run_measures(r) || spool_resume(&r->spool, e)) && shards_resume(r->shards, offset, e);
}

static bool start_anew(struct run *r, const json_t *identity, struct err *e)
{
    char *text = json_dumps(identity, JSON_COMPACT | JSON_SORT_KEYS);
    if (!text) return err_memory(e, "identity", 0);
    bool ok = journal_append(&r->journal, JOURNAL_HEAD, text, strlen(text), true, e);
    free(text);
    return ok;
}

static bool check_identity(struct run *r, const struct journal_record *head, const json_t *now, struct err *e)
{
    json_t *old;
    if (!doc_parse(&old, head->data, head->bytes, e)) return err_note(e, "%s", r->journal.path);
    bool ok = identity_same(old, now, r->destination.work, e);
    json_decref(old);
    if (!ok && r->destination.is_renamed)
        return err_set(e, ERR_ARGUMENT, "%s: already exists; remove it or name another destination",
                       r->destination.path);
    return ok;
}

bool run_resume(struct run *r, struct err *e)
{
    struct journal_record head;
    size_t at = 0;
    const char *work = r->destination.work;
    if (!identity_create(&r->identity, &r->options, &r->source, &r->samples, e)) return false;
    bool ok = journal_open(&r->journal, work, e), has_head = false;
    if (ok) has_head = journal_next(&r->journal, &at, &head) && head.kind == JOURNAL_HEAD;
    /* A checkpoint that was finished and then taken away leaves nothing to continue. */
    if (ok && !r->destination.is_renamed) has_head = has_head && file_exists(r->destination.partial);
    if (ok && has_head) ok = check_identity(r, &head, r->identity, e);
    if (ok && !has_head) {
        journal_close(&r->journal);
        r->is_ours = true;
        ok = destination_clear(&r->destination, r->options.report, e) && journal_open(&r->journal, work, e);
    }
    ok = ok && (r->destination.is_renamed || destination_prepare(&r->destination, r->disk_bytes, e)) &&
         shards_create(&r->shards, r->destination.partial, r->plan.outputs, r->plan.n_outputs,
                       r->options.max_shard_bytes, e) &&
         (!run_measures(r) || spool_init(&r->spool, work, r->plan.n_matrices, e)) &&
         (has_head ? take_up(r, at, e) : start_anew(r, r->identity, e));
    r->is_ours = r->is_ours || ok;
    r->is_started = ok;
    return ok;
}

/* A report of a million matrices has 400 MB. */
static const size_t REPORT_BYTES_MAX = (size_t)1 << 30;

bool run_is_finished(struct run *r, struct err *e)
{
    json_t *report = NULL;
    char *path = file_join(r->destination.path, RECORD_FILE);
    if (!path) return err_memory(e, "path", strlen(r->destination.path));
    bool ok = identity_create(&r->identity, &r->options, &r->source, &r->samples, e);
    bool same = ok && doc_load(&report, path, REPORT_BYTES_MAX, NULL) &&
                json_equal(json_object_get(report, "run"), r->identity);
    json_decref(report);
    free(path);
    if (ok && !same) return destination_exists(&r->destination, e);
    return ok && census(&r->plan, &r->source, r->destination.path, e);
}
