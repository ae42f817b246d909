// The header compiles as C++ and links, and a program that piehost did not start learns so.
#include <cstring>

#include "inferlet.h"

int main()
{
    pie_pass pass = {};
    pie_sampling sampling = {};
    pie_token token = pie_new_token();
    if (pie_init() != PIE_CLOSED || !std::strstr(pie_error().message, "not started by piehost"))
        return 1;
    pie_queue queue = pie_create_queue(0, nullptr);
    pie_future answer;
    if (queue.id || pie_error().code != PIE_CLOSED)
        return 2;
    if (pie_forward(queue, &pass, nullptr) != PIE_CLOSED)
        return 3;
    int code = pie_sample(queue, pie_emb{1}, 0, token, &sampling, &answer);
    if (code != PIE_CLOSED || pie_wait(answer, nullptr) != PIE_CLOSED)
        return 4;
    pie_header header = {"accept", "*/*"};
    pie_chat_message message = {"user", "hi"};
    pie_kv_range range = {pie_kvpage{1}, 0, 1};
    if (pie_http_get("http://a/", &header, 1, nullptr).id ||
        pie_spawn(nullptr, nullptr, 0, nullptr).id || pie_subscribe("t", false, nullptr).id ||
        pie_alloc_history(queue, nullptr, 0, nullptr).id)
        return 5;
    if (pie_chat(0, &message, 1, true, nullptr) != PIE_CLOSED ||
        pie_export_kvpage(queue, "n", &range, 1, "", 0, PIE_NO_LEASE, nullptr) != PIE_CLOSED)
        return 6;
    pie_generation how = {};
    pie_piece piece = {};
    how.stop_when = [](const char *, size_t length, void *) { return length > 9; };
    if (pie_context_create(0) || pie_context_restore(0, "n") || pie_context_fork(nullptr) ||
        pie_context_start(nullptr, &how) != PIE_BAD_HANDLE ||
        pie_context_next(nullptr, &piece) != PIE_BAD_HANDLE || piece.finish != PIE_GOING_ON ||
        pie_context_get_stats(nullptr).pages || pie_gather(&answer, 1, nullptr) != PIE_BAD_HANDLE)
        return 8;
    pie_value value = {};
    pie_value_free(&value);
    return value.kind == PIE_NIL && !pie_ring_in(nullptr) && pie_get_deadline() > 1e300 ? 0 : 7;
}
