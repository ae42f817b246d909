/* conformance_services -- steps without a queue: store, broadcasts, children, HTTP. */

#define BROADCASTS 20

static void store(void)
{
    char value[300];
    pie_future answers[6];
    memset(value, 'v', sizeof value);
    pie_store_set("key", value, sizeof value, &answers[0]);
    tell(answers[0], NULL);
    pie_store_get("key", &answers[1]);
    pie_store_exists("key", &answers[2]);
    pie_store_list("k", NULL, &answers[3]);
    for (int i = 1; i < 4; i++)
        tell(answers[i], NULL);
    pie_store_delete("key", &answers[4]);
    tell(answers[4], NULL);
    pie_store_get("key", &answers[5]);
    tell(answers[5], NULL);
    end("store");
}

static void broadcasts(void)
{
    pie_future answers[6];
    pie_subscription all = pie_subscribe("topic", false, &answers[0]);
    pie_subscription job = pie_subscribe("topic", true, &answers[1]);
    bool there = tell(answers[0], NULL);
    there = tell(answers[1], NULL) && there;
    pie_broadcast("topic", "one", 3, false, &answers[2]);
    pie_broadcast("topic", "second", 6, true, &answers[3]);
    there = tell(answers[2], NULL) && there;
    there = tell(answers[3], NULL) && there;
    if (there) {
        pie_next_message(all, &answers[4]);
        pie_next_message(job, &answers[5]);
        tell(answers[4], NULL);
        tell(answers[5], NULL);
        pie_unsubscribe(all, NULL);
        pie_unsubscribe(job, NULL);
    }
    end("broadcasts");
}

/* More than 1 MiB waits. */
static void lagged(void)
{
    static char much[PIE_MAX_MESSAGE];
    pie_future answer;
    int kept = 0;
    pie_subscription subscription = pie_subscribe("much", false, &answer);
    if (tell(answer, NULL)) {
        for (int i = 0; i < BROADCASTS; i++) {
            pie_broadcast("much", much, sizeof much, false, &answer);
            if (pie_wait(answer, NULL))
                add(" broadcast %s", pie_error_name(pie_error().code));
        }
        while (pie_next_message(subscription, &answer), !pie_wait(answer, NULL))
            kept++;
        add(" %d, then %s", kept, pie_error_name(pie_error().code));
        pie_unsubscribe(subscription, NULL);
    }
    end("lagged");
}

static void children(void)
{
    static const char *const args[] = {"child"};
    pie_future answer;
    pie_child child = pie_spawn(NULL, args, 1, &answer);
    if (tell(answer, NULL)) {
        pie_send_child(child, "hello", 5, &answer);
        if (tell(answer, NULL)) {
            pie_receive_child(child, &answer);
            tell(answer, NULL);
        }
        pie_close_child(child, NULL);
        pie_receive_child(child, &answer);
        tell(answer, NULL);
        pie_wait_child(child, &answer);
        tell(answer, NULL);
        pie_end_child(child, NULL);
    }
    end("children");

    pie_spawn("nobody", NULL, 0, &answer);
    tell(answer, NULL);
    end("no such child");
}

static void http(const char *url)
{
    pie_header header = {"x-conform", "1"};
    pie_future answer, written;
    pie_value part = {0};
    pie_http_get("http://192.0.2.1/", NULL, 0, &answer);
    tell(answer, NULL);
    end("denied");
    if (!url)
        return;
    for (int posting = 0; posting < 2; posting++) {
        pie_http stream = posting ? pie_http_post(url, "first ", 6, &header, 1, true, &answer)
                                  : pie_http_get(url, &header, 1, &answer);
        if (posting) {
            pie_http_write(stream, "second", 6, false, &written);
            if (!tell(written, NULL))
                pie_http_close(stream, NULL); /* or the server waits for the rest of the body */
        }
        bool open = tell(answer, NULL);
        for (bool more = open; more;) {
            part = (pie_value){0};
            pie_http_read(stream, &answer);
            more = tell(answer, &part) && part.length > 0;
            pie_value_free(&part);
        }
        if (open)
            pie_http_close(stream, NULL);
        end(posting ? "http_post" : "http_get");
    }
}
